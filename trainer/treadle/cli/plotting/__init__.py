"""What ``treadle plot`` is made of.

Open ``runs.py`` first: it finds the runs below the given folders and reads them. ``events.py`` reads the event files of
TensorBoard, ``checkpoints.py`` says at which steps a run was saved, ``panels.py`` decides what is drawn, and
``picture.py`` draws it.

These modules import the runtime, and each other; matplotlib and tensorboard only inside of functions.
"""
