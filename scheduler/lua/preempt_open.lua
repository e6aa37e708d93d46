-- Returns the tokens nobody has taken yet.
return waiting - won
