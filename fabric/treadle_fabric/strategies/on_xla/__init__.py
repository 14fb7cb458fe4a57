"""Parts of the strategies for devices of XLA.

``tensors.py`` moves tensors; ``random.py`` seeds the devices. Imports torch-xla inside functions only.
""" 
