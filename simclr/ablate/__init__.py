"""The findings of papers, run again: an experiment is a file of cells, a metric, the paper's values and a rule."""
