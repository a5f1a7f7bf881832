"""Runs the Python snippets on the front of the README with the installed package; `make test-wheel` calls it.

It is run from the root of the repository, whose checkpoint the first snippet loads, in an environment that has the wheel alone.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import hf_hybrid

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if ROOT / "src" in Path(hf_hybrid.__file__).parents:
        sys.exit("This environment imports the sources. Run it with the interpreter that has the wheel.")
    front = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n# Reference\n")[0]
    snippets = re.findall(r"```python\n(.*?)```", front, flags=re.DOTALL)
    if not snippets:
        sys.exit("The README has no snippet of Python.")
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
