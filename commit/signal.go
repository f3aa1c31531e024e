package commit

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// signalNames are the signals of Linux as docker's STOPSIGNAL takes them, their
// second names among them. Real-time ones are counted from RTMIN or RTMAX.
var signalNames = strings.Fields(`ABRT ALRM BUS CHLD CLD CONT FPE HUP ILL INT IO IOT KILL PIPE POLL PROF PWR QUIT
	SEGV STKFLT STOP SYS TERM TRAP TSTP TTIN TTOU URG USR1 USR2 VTALRM WINCH XCPU XFSZ RTMIN RTMAX`)

// checkSignal refuses what names no signal: a number from 1 to 64, or a name
// with SIG before it or not, in any case.
func checkSignal(s string) error {
	if n, err := strconv.Atoi(s); err == nil && n >= 1 && n <= 64 {
		return nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if slices.Contains(signalNames, name) {
		return nil
	}
	for prefix, most := range map[string]uint64{"RTMIN+": 15, "RTMAX-": 14} {
		digits, ok := strings.CutPrefix(name, prefix)
		n, err := strconv.ParseUint(digits, 10, 8)
		if ok && err == nil && n >= 1 && n <= most && digits[0] != '0' {
			return nil
		}
	}
	return fmt.Errorf("invalid signal: %.40q", s)
}
