"""Above the stages: what their programs cost at least, how long they take, where they fit."""
