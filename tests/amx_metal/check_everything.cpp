// The order of the checks: nothing is asked of a tile unit that is none.
#include "check.h"

namespace metal {

void check_everything(Checks& checks) {
    check_tile_unit(checks);
    if (checks.n_failures > 0) {
        say("this machine's tile unit is not the manual's: no kernel was run");
        return;
    }
    say("tile unit: as the manual defines it, ", checks.n_checks, " checks");
    check_peak(checks);
    check_linear(checks);
    check_attention(checks);
}

}  // namespace metal
