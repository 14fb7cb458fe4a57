"""What a checkpoint of the trainer holds, and how a run takes it back.

Start with ``content.py``. ``restore.py`` puts it back, ``exact.py`` keeps what makes a resumed run equal to the last
bit, ``elastic.py`` fits that to another number of ranks, and ``find.py`` finds the file or folder to start from.
"""
