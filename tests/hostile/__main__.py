"""`python -m tests.hostile OUT`: write the corpus, a folder for each case and `corpus.json`.

Every folder holds the models under `in/`, perhaps `recipe.yml`, and an empty `work/`. Run the
listed command in that folder: `exit` and `words` say what must come of it, a folder `code-ran`
says that code of the checkpoint was run.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.hostile.cases import Site
from tests.hostile.corpus import CORPUS


def write_corpus(out: Path) -> list[dict[str, object]]:
    """Write all cases below a new folder and return what `corpus.json` says of them."""
    found: list[dict[str, object]] = []
    for area, cases in CORPUS.items():
        for case in cases:
            name = f"{area}-{re.sub('[^a-z0-9]+', '-', case.name.lower()).strip('-')}"
            site = Site(out / name)
            argv = [word.replace(f"{site.root}/", "") for word in case.command(site)]
            listed = {"name": name, "command": ["resm", *argv], "exit": case.code}
            bounds = {"megabytes": case.megabytes, "seconds": case.seconds}
            found.append({**listed, "words": case.words, **bounds})
    (out / "corpus.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.hostile OUT")
    folder = Path(sys.argv[1])
    folder.mkdir()
    print(f"{folder}: {len(write_corpus(folder))} cases")
