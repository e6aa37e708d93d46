-- Set the state of a breaker, for an operator.  ARGV: ..., state.
local b = read()
move(b, ARGV[3])
return answer('set', b, 0, b.st == CLOSED and 1000 or 0)
