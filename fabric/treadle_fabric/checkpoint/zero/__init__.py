"""Folders that DeepSpeed wrote, whether Treadle lies beside or not: whole tensors out of the partitions of ZeRO.

``files.py`` knows the names of DeepSpeed's files and reads them without running any code, also where DeepSpeed is not
installed; ``partitions.py`` finds where in them the pieces of each tensor lie; ``foreign.py`` reads a folder that
DeepSpeed wrote by itself as a checkpoint. Imports only what the rest of ``checkpoint/`` is made of.
"""
