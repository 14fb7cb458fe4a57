"""The base of enumerations of strings, where users of Lightning Fabric look for it."""

from lightning_utilities.core.enums import StrEnum
from lightning_utilities.core.enums import StrEnum as LightningEnum

__all__ = ["LightningEnum", "StrEnum"]
