-- Abandon: the next caller makes the call.  ARGV: id.   Waiters stay counted.
if call('HGET', made, 'holder') == ARGV[1] then call('HDEL', made, 'holder') end
