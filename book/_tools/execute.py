"""Execute notebooks from top to bottom and store their outputs: ``make notebooks``.

A stored notebook is what readers see, so this command is strict. It refuses a notebook that
writes to stderr, that raises, that takes longer than 90 s, more than 1.5 GB of memory or more
than 1.5 MB of disk, or whose outputs name a folder of this machine. It writes back only what
belongs to the chapter, so that a second run without a change of code changes nothing but
numbers that time themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
import threading
import time
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode

MAX_SECONDS = 90.0
MAX_NOTEBOOK_BYTES = 1_500_000
MAX_IMAGE_BYTES = 150_000
MAX_MEMORY_BYTES = 1.5e9

CELL_METADATA = ("editable", "jupyter", "mystnb", "slideshow", "tags")
NOTEBOOK_METADATA = ("mystnb", "qmri")

PROGRESS_BAR = re.compile(r"^.*\d+%\|.*\|.*$|^.*\d+it \[.*\]\s*$")
OBJECT_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


class Refused(Exception):
    """A notebook that may not be stored; the message is one line for its author."""


@dataclass(frozen=True)
class Cost:
    """What one execution took: wall time in seconds, peak memory of the kernel in bytes."""

    seconds: float
    memory: float


class ThisEnvironment(KernelSpecManager):
    """Runs every notebook with the Python that runs this script, whatever else is installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return the kernel of this environment."""
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class MemoryWatch(threading.Thread):
    """Remembers the most memory that a process and its children ever held together."""

    def __init__(self, pid: int, interval: float = 0.1) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._process = psutil.Process(pid)
        self._interval = interval
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until `stop` is called or the process ends."""
        while not self._stopped.wait(self._interval):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self.peak = max(self.peak, sum(p.memory_info().rss for p in family))
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self.join()


def fetch_data(notebook: NotebookNode) -> None:
    """Make sure that the public files a notebook lists in its metadata are here."""
    names = notebook.metadata.get("qmri", {}).get("data", [])
    if not names:
        return
    from qmri.sources import DataUnavailable, fetch

    for name in names:
        try:
            fetch(name)
        except DataUnavailable as error:
            raise Refused(str(error)) from error


def execute(notebook: NotebookNode, folder: Path) -> Cost:
    """Run all cells in place, in `folder`, and say what it took."""
    clear_outputs(notebook)
    start = time.perf_counter()
    manager = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=ThisEnvironment(),
        transport_encryption="auto",
    )
    client = NotebookClient(
        notebook,
        km=manager,
        timeout_func=lambda cell: max(1, int(MAX_SECONDS - (time.perf_counter() - start))),
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        with client.setup_kernel(cleanup_kc=True):
            watch = MemoryWatch(manager.provisioner.pid)
            watch.start()
            try:
                for index, cell in enumerate(notebook.cells):
                    client.execute_cell(cell, index)
            finally:
                watch.stop()
    except CellTimeoutError as error:
        raise Refused(f"takes longer than {MAX_SECONDS:.0f} s") from error
    except CellExecutionError as error:
        raise Refused(f"raises {error.ename}: {error.evalue}\n\n{error.traceback}") from error
    return Cost(time.perf_counter() - start, watch.peak)


def clear_outputs(notebook: NotebookNode) -> None:
    """Forget what an earlier run left in the code cells."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None


def without_progress(text: str) -> str:
    """Keep what a terminal would show in the end, progress bars left out."""
    lines = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if not PROGRESS_BAR.match(line))


def normalise(notebook: NotebookNode) -> None:
    """Keep what belongs to the chapter and nothing that belongs to the run."""
    kept = {k: notebook.metadata[k] for k in NOTEBOOK_METADATA if k in notebook.metadata}
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
        **kept,
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    for cell in notebook.cells:
        metadata = {k: cell.metadata[k] for k in CELL_METADATA if k in cell.metadata}
        cell.metadata = NotebookNode(metadata)
        cell.source = cell.source.strip("\n")
        cell.id = unused_id(cell, seen)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := normal_output(output))]


def unused_id(cell: NotebookNode, seen: set[str]) -> str:
    """Name a cell after its own text: the same text always gets the same name."""
    name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
    candidate, count = name, 1
    while candidate in seen:
        count += 1
        candidate = f"{name}-{count}"
    seen.add(candidate)
    return candidate


def normal_output(output: NotebookNode) -> NotebookNode | None:
    """Return the output as it is stored, or None if nothing is left of it."""
    if output.output_type == "stream":
        output.text = without_progress(output.text)
        return output if output.text.strip() else None
    output.pop("transient", None)
    return output


def check_outputs(notebook: NotebookNode) -> None:
    """Raise `Refused` for an output that no reader should meet."""
    private = {str(Path.cwd()), str(Path.home()), tempfile.gettempdir()} - {"/", ""}
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            where = f"cell {index}"
            if output.output_type == "stream" and output.name == "stderr":
                raise Refused(f"{where} writes to stderr: {output.text.strip()[:500]}")
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            for path in private:
                if path in text:
                    raise Refused(f"{where} prints a folder of this machine: {text.strip()[:200]}")
            if OBJECT_ADDRESS.search(text):
                raise Refused(
                    f"{where} prints a memory address, which changes with every run "
                    f"(end a plotting line with ;): {text.strip()[:200]}"
                )
            image = b64decode(output.get("data", {}).get("image/png", ""))
            if len(image) > MAX_IMAGE_BYTES:
                raise Refused(
                    f"{where} draws a picture of {len(image) / 1e3:.0f} kB, "
                    f"more than {MAX_IMAGE_BYTES / 1e3:.0f} kB: draw fewer points or pixels"
                )


def store(notebook: NotebookNode, path: Path) -> int:
    """Write the notebook in one step, so that an interruption leaves the old one; its size."""
    text = nbformat.writes(notebook) + "\n"
    size = len(text.encode())
    if size > MAX_NOTEBOOK_BYTES:
        raise Refused(f"is {size / 1e6:.2f} MB, more than {MAX_NOTEBOOK_BYTES / 1e6} MB")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return size


def run(path: Path) -> str:
    """Execute and store one notebook; return one line that says what it took."""
    notebook = nbformat.read(path, as_version=4)
    fetch_data(notebook)
    cost = execute(notebook, path.parent)
    normalise(notebook)
    check_outputs(notebook)
    if cost.seconds > MAX_SECONDS:
        raise Refused(f"takes {cost.seconds:.0f} s, more than {MAX_SECONDS:.0f} s")
    if cost.memory > MAX_MEMORY_BYTES:
        raise Refused(
            f"takes {cost.memory / 1e9:.2f} GB of memory, more than {MAX_MEMORY_BYTES / 1e9} GB"
        )
    size = store(notebook, path)
    return f"{cost.seconds:5.1f} s  {cost.memory / 1e6:5.0f} MB memory  {size / 1e3:5.0f} kB"


def main() -> int:
    """Run the command line; 0 if every notebook was stored."""
    parser = argparse.ArgumentParser(description="Execute notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    failed = 0
    for path in parser.parse_args().notebooks:
        try:
            print(f"{path}  {run(path)}", flush=True)
        except (Refused, FileNotFoundError) as error:
            failed += 1
            print(f"{path}: not stored: {error}", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
