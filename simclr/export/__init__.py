"""An encoder on its way out: in the form that another library opens, checked by that library, with a card beside it."""
