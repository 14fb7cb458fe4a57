"""What a user's methods take and return.

``arguments.py`` reads which arguments a step takes; ``returned.py`` has the types of what methods return. Imports
nothing of this package.
"""
