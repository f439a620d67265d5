"""What the programs of the stages took: phases, peers turn by turn, and starts, as measured."""
