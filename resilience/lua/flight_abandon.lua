-- Abandon: whoever asks next makes the call.  ARGV: id.   Those who wait stay counted.
if call('HGET', made, 'holder') == ARGV[1] then call('HDEL', made, 'holder') end
