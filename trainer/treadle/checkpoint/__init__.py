"""What a checkpoint of the trainer holds, and how a run takes it back.

Start with ``content.py``. ``restore.py`` puts it back, ``exact.py`` keeps what makes a resumed run equal to the last
bit, ``elastic.py`` fits that to another number of ranks, ``find.py`` and ``auto_resume.py`` find files, and
``loading.py`` makes a module from a checkpoint (it is below the module's layer, the others are above the run's).
"""
