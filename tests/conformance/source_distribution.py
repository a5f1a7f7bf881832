"""The common tests of Transformers, from the source distribution of the installed release.

The wheel does not carry them, the source distribution of the same version does. `load` fetches that once with pip, unpacks
its tests into a cache folder and imports them as a package; nothing of it enters this repository. Three modules that the
tests import are missing from the distribution: two hold tests of their own (of exporters and of generation), one a dictionary
of configuration arguments. They are replaced by empty ones, a text that is read by one of ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from filelock import FileLock

PACKAGE = "transformers_common_tests"
MISSING_FILES = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fixtures/sample_text.txt": "A text of more than one line.\n\nIt is read, and no check uses it.\n",
}
CACHE_VARIABLE = "HF_HYBRID_TEST_CACHE"
SKIP_VARIABLE = "HF_HYBRID_SKIP_CONFORMANCE"


class SourceDistributionError(RuntimeError):
    """The source distribution of the installed Transformers could not be fetched."""


def cache_folder() -> Path:
    """Where the tests of each release are kept: the folder named by HF_HYBRID_TEST_CACHE, or one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_hybrid"
    return Path(os.environ.get(CACHE_VARIABLE) or default)


def download(version: str, folder: Path) -> Path:
    """Lets pip fetch the source distribution of Transformers `version` into `folder`."""
    # pip asks the distribution for its metadata. With the setuptools that is installed that takes a second, otherwise pip
    # first builds an environment for it.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command += ["download", "--quiet", "--no-deps", "--no-binary", "transformers", *isolation]
    command += ["--dest", str(folder), f"transformers=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("transformers-*.tar.gz"))
    if result.returncode or not found:
        raise SourceDistributionError(
            f"The common tests of Transformers {version} could not be fetched: `{' '.join(command)}` ended with status "
            f"{result.returncode}:\n{(result.stderr or result.stdout).strip()[-2000:]}\n"
            f"Run the tests once with a package index in reach (the result is kept in {cache_folder()}), or set "
            f"{SKIP_VARIABLE}=1 to leave these tests out."
        )
    return found[0]


def unpack(archive: Path, package: Path) -> None:
    """Unpacks the Python files of the tests of a source distribution as the package `package`."""
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and member.name.endswith(".py") and ".." not in parts:
                target = package.joinpath(*parts[2:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.extractfile(member).read())
    if not (package / "test_modeling_common.py").is_file():
        raise SourceDistributionError(f"{archive.name} holds no tests/test_modeling_common.py.")
    for name, text in MISSING_FILES.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text(text)
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()


def fetch(version: str) -> Path:
    """The folder with the package of tests of Transformers `version`, fetched if the cache has it not.

    Processes that ask at once wait for the first of them; when it fails, the others of the same test run repeat its message.
    """
    folder = cache_folder() / f"transformers-{version}"
    if (folder / PACKAGE).is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    failure = folder.parent / f"{folder.name}.failed-{run}"
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if (folder / PACKAGE).is_dir():
            return folder
        if failure.exists():
            raise SourceDistributionError(failure.read_text())
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            unpack(download(version, temporary), temporary / folder.name / PACKAGE)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary / folder.name, folder)
        except SourceDistributionError as error:
            for old in folder.parent.glob(f"{folder.name}.failed-*"):
                old.unlink(missing_ok=True)
            failure.write_text(str(error))
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(module: str) -> ModuleType:
    """Imports a module of the common tests, for example "test_modeling_common".

    Raises:
        SourceDistributionError: the source distribution is not in the cache and cannot be fetched.
    """
    if PACKAGE not in sys.modules:
        path = fetch(transformers.__version__) / PACKAGE
        specification = importlib.util.spec_from_file_location(
            PACKAGE, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        package = importlib.util.module_from_spec(specification)
        sys.modules[PACKAGE] = package
        specification.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.{module}")
