"""What ``import lightning_fabric`` finds under ``treadle run``: Treadle, by the names of Lightning."""

from treadle.compat import replace_lightning

replace_lightning()  # puts the module of the table in this one's place
