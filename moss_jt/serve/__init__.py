"""A loaded model over HTTP: OpenAI's interface, the reference's, MOSS Vortex's, and the page's own. docs/serving.md has it all."""
