"""The lower bounds of pyproject.toml as constraints for pip, one a line: `make test-lowest` installs these."""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.match(r"([\w-]+)>=([\w.]+)", requirement):
        print("==".join(bound.groups()))
