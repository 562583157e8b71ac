"""adapterctl: register, merge, prove, evaluate and promote LoRA adapters, on top of MLflow.

Nothing is imported here, so that the command line starts at once and `import adapterctl` costs nothing.
"""

TYPE_CHECKING = False  # typing's own constant would cost an import
if TYPE_CHECKING:
    from .registry.api import RegistryAPI

__version__ = "0.1.0"


def connect(home: "str | None" = None) -> "RegistryAPI":
    """The registry of this machine, as every command sees it: `adapterctl.connect().merge(...)`.

    `home` overrides ADAPTERCTL_HOME; see `adapterctl.registry.api.RegistryAPI` for the verbs.
    """
    from .bootstrap import connect as _connect
    from .registry.settings import load_settings

    return _connect(load_settings({"home": home}))
