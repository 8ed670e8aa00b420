"""The command ``qmri``: run a study, fetch public data, estimate maps from images."""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

import qmri
from qmri.files import MODELS, NOISES, estimate_files, network_names
from qmri.sources import SOURCES, CorruptFile, DataUnavailable, fetch, is_available

__all__ = ["main"]

# What a user can put right: these end in one line, everything else in a traceback.
USER_ERRORS = (ValueError, OSError, DataUnavailable, CorruptFile)

NETWORKS_STUDY = "Train, compare and score every network of the study."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows ``qmri`` on the command line; read from there by default.

    Returns
    -------
    int
        Exit status: 0, 2 for an error that the user can put right (one line on
        stderr says how), 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        As argparse does: status 2 for an unknown command or option, 0 for
        ``--help`` and ``--version``.
    """
    options = _parser().parse_args(arguments)
    try:
        with _progress_on_stderr():
            options.run(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted: run the same command again to {options.again}\n")
        return 130
    except USER_ERRORS as error:
        sys.stderr.write(f"qmri: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qmri", description="Parameter estimation in quantitative MRI."
    )
    parser.add_argument("--version", action="version", version=f"qmri {qmri.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_study(commands)
    _add_estimate(commands)
    _add_fetch(commands)
    return parser


def _add_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser("study", help="run a paper's study and keep its results")
    studies = study.add_subparsers(dest="study", required=True)
    _add_one_study(
        studies,
        "training-labels",
        _run_training_labels,
        "what a network should learn: truth, maximum likelihood, or nothing",
        NETWORKS_STUDY,
        ["paper", "abdomen"],
        "b-values to train for: the paper's, or those of the public abdominal data",
    )
    _add_one_study(
        studies,
        "crb-loss",
        _run_crb_loss,
        "errors in units of the Cramer-Rao bound: networks for MT fingerprints",
        NETWORKS_STUDY,
        ["published", "default"],
        "train of pulses: the published one, which is fetched, or the library's own",
    )
    _add_one_study(
        studies,
        "abdomen",
        _run_abdomen,
        "networks and maximum likelihood in the abdomen of volunteers",
        "Estimate IVIM parameters of public images, which are fetched, with the networks of "
        "`qmri study training-labels --protocol abdomen`.",
    )
    _add_one_study(
        studies,
        "brain",
        _run_brain,
        "networks and least squares in a slice of a brain",
        "Fit the published magnetization-transfer slice, which is fetched, and compare the "
        "networks of `qmri study crb-loss` with the fit.",
    )


def _add_one_study(
    studies: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    description: str,
    protocols: Sequence[str] = (),
    meaning: str = "",
) -> None:
    study = studies.add_parser(
        name,
        help=summary,
        description=f"{description} A run that was interrupted goes on where it was when the "
        "same command is given again.",
    )
    study.add_argument(
        "--scale", choices=("quick", "paper"), required=True, help="how much to compute"
    )
    if protocols:
        study.add_argument("--protocol", choices=protocols, default=protocols[0], help=meaning)
    study.add_argument("--seed", type=_seed, default=0, help="where random numbers start (0)")
    study.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results (that of the book)"
    )
    study.add_argument(
        "--fresh", action="store_true", help="start anew: forget what an earlier run finished"
    )
    study.set_defaults(run=run, again="go on")


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed, expected an integer from 0 up")
    return int(text)


def _run_training_labels(options: argparse.Namespace) -> None:
    # Here, so that the other commands do not wait for PyTorch.
    from qmri.studies import training_labels

    training_labels.run(**_of_study(options))


def _run_crb_loss(options: argparse.Namespace) -> None:
    from qmri.studies import crb_loss

    crb_loss.run(**_of_study(options))


def _run_abdomen(options: argparse.Namespace) -> None:
    from qmri.studies import abdomen

    abdomen.run(**_of_study(options))


def _run_brain(options: argparse.Namespace) -> None:
    from qmri.studies import brain

    brain.run(**_of_study(options))


def _of_study(options: argparse.Namespace) -> dict:
    names = ("scale", "protocol", "seed", "out", "fresh")
    return {name: getattr(options, name) for name in names if name in options}


def _add_estimate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "estimate",
        help="parameter maps of your own images",
        description="Estimate parameter maps of diffusion-weighted images and write them as "
        "NIfTI files, with a picture and with maps.json, which says how they were made. Maps of "
        "an earlier run in the same folder are replaced as a whole.",
        epilog="`qmri estimate --list` shows the trained networks.",
    )
    parser.add_argument("image", type=Path, metavar="DWI", help="4-D NIfTI file, volumes last")
    parser.add_argument(
        "--bvals", type=Path, required=True, metavar="FILE", help="one b-value per volume, s/mm2"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the maps"
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="3-D NIfTI file, voxels above 0.5 are estimated (those with signal)",
    )
    parser.add_argument(
        "--model", choices=list(MODELS), default="ivim", help="signal model (%(default)s)"
    )
    parser.add_argument(
        "--noise",
        choices=list(NOISES),
        default="rician",
        help="what maximum likelihood assumes (%(default)s)",
    )
    parser.add_argument(
        "--estimator",
        default="mle",
        metavar="mle|NAME",
        help="maximum likelihood, or a trained network (%(default)s)",
    )
    parser.add_argument(
        "--sigma",
        type=_sigma,
        metavar="S",
        help="noise in the unit of the images (from repeated images at b = 0, or from residuals)",
    )
    parser.add_argument(
        "--list", action=_ListNetworks, nargs=0, help="show the names of trained networks and exit"
    )
    parser.set_defaults(run=_run_estimate, again="start anew")


class _ListNetworks(argparse.Action):
    """Show the networks, whatever else is missing on the command line."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name in network_names():
            sys.stdout.write(f"{name}\n")
        parser.exit()


def _sigma(text: str) -> float:
    try:
        sigma = float(text)
    except ValueError:
        sigma = math.nan
    if not (math.isfinite(sigma) and sigma > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no noise level, expected a positive number")
    return sigma


def _run_estimate(options: argparse.Namespace) -> None:
    names = ("image", "bvals", "out", "mask", "model", "noise", "estimator", "sigma")
    found = estimate_files(**{name: getattr(options, name) for name in names}, progress=True)
    for path in found.files:
        sys.stdout.write(f"{path}\n")


def _add_fetch(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "fetch",
        help="get public data",
        description="Get files of public data and write where they are, one a line.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("names", nargs="*", metavar="NAME", default=[], help="as --list shows them")
    what.add_argument("--list", action="store_true", help="show every file, and which are here")
    parser.set_defaults(run=_run_fetch, again="go on")


def _run_fetch(options: argparse.Namespace) -> None:
    if options.list:
        width = max(map(len, SOURCES))
        for name, source in SOURCES.items():
            state = "here" if is_available(name) else "not here"
            sys.stdout.write(f"{name:{width}}  {state:8}  {source.licence}\n")
    for name in options.names:
        sys.stdout.write(f"{fetch(name)}\n")


@contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Show what the library logs, above a progress bar if there is one."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(self.format(record), file=sys.stderr)

    logger, lines = logging.getLogger("qmri"), Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
