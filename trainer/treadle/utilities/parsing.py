"""What reads objects, their arguments and hyper-parameters, where users of a trainer look for it."""

from treadle.module.hparams import (
    clean_namespace,
    collect_init_args,
    get_init_args,
    parse_class_init_keys,
    save_hyperparameters,
)
from treadle.searches.attributes import lightning_getattr, lightning_hasattr, lightning_setattr
from treadle_fabric import AttributeDict, is_picklable

__all__ = [
    "AttributeDict",
    "clean_namespace",
    "collect_init_args",
    "get_init_args",
    "is_picklable",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
    "parse_class_init_keys",
    "save_hyperparameters",
]
