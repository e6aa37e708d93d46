-- Create the root account, once.  ARGV: ms to keep, limits (JSON: unit -> amount).
-- Returns 1, or 0 if it existed.
if call('HEXISTS', accounts, '') == 1 then return 0 end
local limits = cjson.decode(ARGV[2])
put({name = '', of = '', got = limits, free = limits, held = {}, spent = {}})
keep()
return 1
