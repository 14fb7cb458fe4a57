"""What callbacks share that report to another program: ``to_ray.py``, the base of those for Ray Tune and Train."""
