"""The parts of ``deepspeed.py``: ZeRO's stages on DeepSpeed.

Start with ``config.py``, which makes DeepSpeed's config of a strategy's arguments and is pure. ``engine.py`` runs a
module, or one of its methods, through DeepSpeed's engine. Imports what is below the strategies; DeepSpeed itself inside
of functions only.
"""
