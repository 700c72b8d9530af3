"""A plugin of your own, in 30 lines: MOSS searches, and this dictionary answers.

    python -P -m moss_jt.demos.own_plugin

MOSS calls what it was trained to call, so a plugin does best behind one of its four functions. docs/plugins.md says
how to install one, so that `moss-jt chat --plugins NAME` knows it.
"""

from moss_jt import Item, Moss, Outcome, Source
from moss_jt.convert.named import model_folder
from moss_jt.plugins.interface import Style


class Glossary:
    """Search(query), answered from a dictionary."""

    name = "glossary"  # for --plugins and /plugins
    label = "Web search"  # its line in the meta instruction: "- Web search: enabled. API: Search(query)"
    function, argument = "Search", "query"
    style: Style = "items"  # numbered results, which MOSS cites; "value" is one short answer
    timeout_s = 2.0

    entries = {
        "the Moon": "the Moon old quiet bright stone.",
        "长城": "长城古老，北方，山脉，历史。",
    }

    def call(self, argument: str, wanted: int) -> Outcome:
        """Whatever this raises is a "No result." for the model."""
        text = self.entries[argument]
        return Outcome(items=(Item(text, Source("the glossary", argument)),))


if __name__ == "__main__":
    with Moss.load(model_folder("moss-tiny")) as moss:
        chat = moss.chat(plugins=[Glossary(), "calculator"], temperature=0)
        for message in ("Tell me about the Moon", "请介绍一下长城"):
            print(f"\n> {message}")
            for event in chat.send(message):
                print(f"{event.kind:>8}  {event}")
