-- Put a breaker into a state by hand.  ARGV: ..., state.
local b = read()
move(b, ARGV[3])
return answer('set', b, 0, b.st == CLOSED and 1000 or 0)
