"""The controller: watches which experts are popular, plans, and moves copies if it may."""
