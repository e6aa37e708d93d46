-- Take the first out of a line.  KEYS[1]: line.  ARGV: how many.   Returns them.
local found, popped = {}, redis.call('ZPOPMIN', KEYS[1], ARGV[1])
for i = 1, #popped, 2 do found[#found + 1] = popped[i] end
return found
