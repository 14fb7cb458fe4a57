"""What ModelPruning is made of.

``methods.py`` reads what is to be pruned and how, ``masks.py`` applies, saves and restores masks. Imports the runtime.
"""
