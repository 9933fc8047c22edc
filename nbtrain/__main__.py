"""`python -m nbtrain demo` shows the whole promise in two minutes."""

import sys


def main(words: list[str]) -> int:
    """Run the demo; for anything else say what there is."""
    if words == ["demo"]:
        from nbtrain import demo

        return demo.main()
    print("usage: python -m nbtrain demo", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
