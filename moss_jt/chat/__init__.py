"""Conversations: prompts in the trained format, turns, plugins' results, events for front ends."""
