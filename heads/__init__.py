"""Draft heads trained with this project, in the released file format; each folder has its model card."""
