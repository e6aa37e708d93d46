-- Returns the number of open tokens: nodes that wait, less the tokens that were won.
return waiting - won
