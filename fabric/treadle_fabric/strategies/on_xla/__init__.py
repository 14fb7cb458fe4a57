"""Parts of the strategies for devices of XLA.

``host.py`` brings tensors to the host; ``random.py`` seeds the devices. Imports torch-xla inside functions only.
""" 
