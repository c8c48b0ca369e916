"""Sends the metrics of a run to Weights & Biases (W&B), in a thread of its own, for which training never waits.

The W&B run has the id of the run, so a resumed run continues it. Rows that a resumed run repeats are ignored by W&B.
`WANDB_MODE=offline` writes to the run folder only, and so does a run that cannot reach the server; `wandb sync` uploads
later. WANDB_PROJECT and all other variables of W&B apply.
"""

import logging
import os
from netrc import NetrcParseError, netrc
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from iwm_fast.config.loading import config_to_dict
from iwm_fast.config.run import RunConfig

log = logging.getLogger(__name__)

_PROJECT = "iwm-fast"
# A server that does not answer within this time counts as unreachable. W&B's own default is 90 seconds.
_CONNECT_S = 60.0
# The end of a run waits this long for rows that are still being uploaded. A preempted run has to leave soon.
_CLOSE_S = 20.0

Row = tuple[int, dict[str, float]]


def require_login() -> None:
    """Check that there is an API key, unless W&B is offline or disabled. The server is not asked.

    Raises:
        ValueError: with the remedy, if there is none.
    """
    import wandb  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    settings = wandb.setup().settings
    is_local = settings.mode in ("offline", "dryrun", "disabled")
    if not (is_local or settings.api_key or settings.identity_token_file or _is_in_netrc(settings.base_url)):
        raise ValueError(
            "output.loggers has wandb, but there is no API key for W&B; run `wandb login`, set WANDB_API_KEY, set "
            "WANDB_MODE=offline to upload later, or remove wandb from output.loggers"
        )


def _is_in_netrc(server: str) -> bool:
    """Return whether the file that `wandb login` writes has a key. `wandb.login` would ask the server."""
    path = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        keys = netrc(path)
    except (OSError, NetrcParseError):
        return False
    # Versions of W&B have several names for their own server.
    return any(keys.authenticators(host) for host in (urlsplit(server).netloc, "api.wandb.ai"))


class WandbLogger:
    """The W&B run of a training run."""

    def __init__(self, config: RunConfig, run_id: str) -> None:
        """Start the thread, which connects to the server; `run_id` stays the same when the run is resumed."""
        self._config: RunConfig = config
        self._folder = Path(config.output.folder).absolute()
        self._run_id: str = run_id
        self._rows: SimpleQueue[Row | None] = SimpleQueue()
        # A daemon, so that a server that hangs does not keep the process alive.
        self._thread = Thread(target=self._send_all, name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hand one row to the thread."""
        self._rows.put((step, values))

    def close(self) -> None:
        """Wait for the upload of all rows, but not for long; what is left can be uploaded with `wandb sync`."""
        self._rows.put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning(
                "W&B has not confirmed all rows within %.0f s; they are in metrics.jsonl, and `wandb sync %s` uploads "
                "those that W&B had taken",
                _CLOSE_S, self._folder / "wandb" / "*run-*",
            )  # fmt: skip

    def _send_all(self) -> None:
        try:
            import wandb  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

            run = self._open(wandb)
            while (row := self._rows.get()) is not None:
                step, values = row
                run.log(values, step=step)
            self._add_files(wandb, run)
            run.finish()
        # An error of W&B must not stop training.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.warning("W&B receives no more rows (%s); metrics.jsonl has all of them", reason)

    def _open(self, wandb: Any) -> Any:
        try:
            run = self._init(wandb, None)
        except wandb.Error as error:
            log.warning("W&B cannot be reached and continues offline: %s", str(error).splitlines()[0])
            # The service of W&B refuses an id whose first attempt it has not given up.
            wandb.teardown()
            run = self._init(wandb, "offline")
        upload = f"`wandb sync {self._folder / 'wandb' / f'offline-run-*-{self._run_id}'}` uploads it"
        log.info("W&B run %s: %s", self._run_id, upload if run.offline else run.url)
        return run

    def _init(self, wandb: Any, mode: str | None) -> Any:
        # Without capture of the console, which the progress display uses.
        settings = wandb.Settings(console="off", silent=True, init_timeout=_CONNECT_S)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=self._run_id, name=self._folder.name, resume="allow", dir=self._folder, mode=mode,
            config=config_to_dict(self._config), settings=settings,
        )  # fmt: skip

    def _add_files(self, wandb: Any, run: Any) -> None:
        """Log the pictures in the run folder, such as those of `iwm imagine`, and refer to the checkpoints."""
        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in sorted(self._folder.glob("*.png"))}
        if pictures:
            run.log(pictures)
        checkpoints = wandb.Artifact(f"checkpoints-{self._run_id}", type="model")
        # Without checksums, which would read all files.
        checkpoints.add_reference((self._folder / "checkpoints").as_uri(), checksum=False)
        run.log_artifact(checkpoints)
