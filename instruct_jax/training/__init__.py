"""Training of any parameters by any loss: what the stages share, knowing no model and no stage.

mesh        the device mesh, partition rules, placing a batch
state       TrainState, accumulated gradients, the guarded update, the compiled step
optim       schedules, Adam in both forms, the average of the weights
checkpoint  atomic, asynchronous checkpoints; the final model of a stage
metrics     JSONL, TensorBoard and progress
loop        the loop: resume, log, evaluate, save, stop on a signal

Import from the modules: this file loads nothing, so that a use of one does not pay for all.
"""
