"""``python -m moss_jt`` is ``moss-jt``."""

from moss_jt.commands.cli import main

if __name__ == "__main__":
    main()
