"""What the programs of the stages cost: by formula, compiled for a machine, and where they fit."""
