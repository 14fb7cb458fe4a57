"""Modules that know their device and dtype, where users of Lightning Fabric look for them."""

from treadle_fabric.setup import device_aware

__all__: list[str] = []

_DeviceDtypeModuleMixin = device_aware.DeviceDtypeModuleMixin
