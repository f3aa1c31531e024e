// Package link puts a network of known shape between a client and a registry
// on the same machine. A Link shapes TCP: delay and rate; a Recorder reads
// HTTP: it counts requests and bytes by class and can spoil answers. Both
// listen on the loopback interface only.
package link

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Profile is the shape of a link. The zero value neither delays nor limits.
type Profile struct {
	Name string
	// RTT is the round trip; half of it is spent in each direction.
	RTT time.Duration
	// Rate is in bytes a second for each direction, shared by all the
	// connections of the link. 0 is unlimited.
	Rate int64
}

// The predefined profiles.
var (
	None       = Profile{Name: "none"}
	Datacenter = Profile{Name: "datacenter", RTT: time.Millisecond, Rate: 1e9 / 8}
	Edge       = Profile{Name: "edge", RTT: 50 * time.Millisecond, Rate: 50e6 / 8}
)

// delay is the way in one direction.
func (p Profile) delay() time.Duration { return p.RTT / 2 }

// chunk is how much is read at once: about a millisecond of the link, so that
// connections take turns finely enough and timers are not the limit.
func (p Profile) chunk() int {
	if p.Rate <= 0 {
		return maxChunk
	}
	return int(min(max(p.Rate/1000, 4<<10), maxChunk))
}

// transmit is how long the link is busy with n bytes.
func (p Profile) transmit(n int) time.Duration {
	if p.Rate <= 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(p.Rate) * float64(time.Second))
}

func (p Profile) String() string {
	if p.Rate <= 0 {
		return fmt.Sprintf("%s: round trip %v, rate unlimited", p.Name, p.RTT)
	}
	return fmt.Sprintf("%s: round trip %v, %g Mbit/s", p.Name, p.RTT, float64(p.Rate)*8/1e6)
}

// ParseProfile reads the name of a predefined profile, or a description such
// as "rtt=20ms,rate=100mbit". The units of a rate are kbit, mbit and gbit a
// second, or none for bytes a second; what is left out is not limited.
func ParseProfile(s string) (Profile, error) {
	for _, p := range []Profile{None, Datacenter, Edge} {
		if s == p.Name {
			return p, nil
		}
	}
	p := Profile{Name: s}
	for part := range strings.SplitSeq(s, ",") {
		key, value, _ := strings.Cut(part, "=")
		var err error
		switch key {
		case "rtt":
			p.RTT, err = time.ParseDuration(value)
			if err == nil && p.RTT < 0 {
				err = fmt.Errorf("negative")
			}
		case "rate":
			p.Rate, err = parseRate(value)
		default:
			err = fmt.Errorf("neither a known profile nor rtt= or rate=")
		}
		if err != nil {
			return Profile{}, fmt.Errorf("parse link profile %q: %q: %w", s, part, err)
		}
	}
	return p, nil
}

func parseRate(s string) (int64, error) {
	unit := 1.0
	for suffix, bits := range map[string]float64{"kbit": 1e3, "mbit": 1e6, "gbit": 1e9} {
		if number, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = number, bits/8
			break
		}
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return 0, err
	}
	bytes := v * unit
	if !(bytes >= 1 && bytes < 1<<50) {
		return 0, fmt.Errorf("rate out of range")
	}
	return int64(bytes), nil
}
