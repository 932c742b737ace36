"""Saves in the background: one at a time in a folder, none of them lost when Python ends."""

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


class Saving:
    """A save that is under way in the background, or done.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lowbit_optim import save_checkpoint
        >>> folder = tempfile.TemporaryDirectory()
        >>> saving = save_checkpoint(folder.name, model=torch.nn.Linear(64, 64), background=True)
        >>> saving.wait()
        >>> saving.done()
        True
        >>> folder.cleanup()
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether it has ended, well or not.

        Example:
            >>> from lowbit_optim.checkpoint import Saving
            >>> Saving().done()
            True
        """
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when it has ended; what it raised is raised here, by the first call.

        Example:
            >>> import tempfile
            >>> import torch
            >>> from lowbit_optim import save_checkpoint
            >>> folder = tempfile.TemporaryDirectory()
            >>> saving = save_checkpoint(folder.name, model=torch.nn.Linear(64, 64), background=True)
            >>> saving.wait()
            >>> folder.cleanup()
        """
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Return when it has ended."""
        if self._thread is not None:
            self._thread.join()

    def start(self, work: Callable[[], None]) -> None:
        """Do the work in a thread that Python waits for before it ends."""
        thread = threading.Thread(target=self._run, args=(work,), name="save_checkpoint", daemon=False)
        thread.start()
        self._thread = thread  # only now: one that could not be started cannot be joined

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            # The frames that the error names would keep the copy on the host until somebody asks for the error.
            del work
            traceback.clear_frames(error.__traceback__)
            self._error = error

    def report(self) -> None:
        """Print an error that nobody waited for."""
        if self._error is not None:
            print("a checkpoint that was saved in the background, and that nobody waited for:", file=sys.stderr)
            traceback.print_exception(self._error)


# By folder, the last that was begun in the background: whoever saves next there may have no object in common with it.
_last: dict[str, Saving] = {}


def last_in(folder: Path) -> Saving:
    """The last save into a folder; one that is done, if none was in the background."""
    return _last.get(os.path.realpath(folder), Saving())


def join_last(folder: Path) -> None:
    """Return when the last save into a folder has ended, and that into its parent, which ``keep`` may have here."""
    for saved in (folder, Path(os.path.realpath(folder)).parent):
        last_in(saved).join()


def join_all() -> None:
    """Return when all saves have ended: ranks that save together must not exchange anything in two threads."""
    for saving in [*_last.values()]:
        saving.join()


def in_background(folder: Path, work: Callable[[], None]) -> Saving:
    saving = Saving()
    saving.start(work)
    _last[os.path.realpath(folder)] = saving
    return saving


@atexit.register
def _report() -> None:  # Python has waited for the threads
    for saving in _last.values():
        saving.report()
