"""What can be measured of a stage's candidates, one module each; `runner` holds what they share."""
