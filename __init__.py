"""adapterctl: register, merge, prove, evaluate and promote LoRA adapters, on top of MLflow.

Nothing is imported here, so that the command line starts at once and `import adapterctl` costs nothing.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; `typing` itself is not worth loading for this
if TYPE_CHECKING:
    import os

    from .registry.api import RegistryAPI


def connect(home: str | os.PathLike[str] | None = None, *, readonly: bool = False) -> RegistryAPI:
    """Open the registry in `home`, or where the settings say; make it unless `readonly`.

    The verbs are those of `registry.api.RegistryAPI`, as every command uses them: `adapterctl.connect().merge(...)`.
    """
    # deferred: opens databases, and with them SQLAlchemy
    from pathlib import Path

    from .bootstrap import open_registry
    from .registry.settings import load_settings

    settings = load_settings({"home": Path(home).expanduser().absolute() if home is not None else None})
    return open_registry(settings, readonly=readonly)
