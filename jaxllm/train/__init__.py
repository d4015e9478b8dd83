"""train: real steps on a text, with what a run leaves behind: metrics, checkpoints, a record of what was asked."""
