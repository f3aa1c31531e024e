package fetch

import "time"

// What is on the wire beyond what fills the link waits in some queue of the network,
// and a reader waits behind it. So both are measured: how long an answer takes to
// begin, and how much comes in a second when much is asked for.
const (
	leastFull    = 128 << 10
	leastWindow  = 512 << 10
	mostWindow   = 32 << 20
	leastPortion = 512 << 10
	mostPortion  = 4 << 20
	tick         = 100 * time.Millisecond
	epoch        = 30 * time.Second
)

// wire is what is known of the way to the registries. The zero value knows nothing.
type wire struct {
	trip, last time.Duration // the shortest time to an answer, of this epoch and the one before
	began      time.Time     // the epoch

	since time.Time // the tick
	bytes int64
	rates [16]float64 // bytes a second, of the last ticks in which something came
	at    int
}

// answered notes how long an answer took to begin.
func (k *wire) answered(d time.Duration, now time.Time) {
	if now.Sub(k.began) > epoch {
		k.trip, k.last, k.began = 0, k.trip, now
	}
	if k.trip == 0 || d < k.trip {
		k.trip = d
	}
}

// came notes that n bytes came.
func (k *wire) came(n int, now time.Time) {
	switch d := now.Sub(k.since); {
	case d > 3*tick: // nothing was asked for meanwhile
		k.since, k.bytes = now, 0
		return
	case d > tick:
		k.rates[k.at%len(k.rates)] = float64(k.bytes) / d.Seconds()
		k.at++
		k.since, k.bytes = now, 0
	}
	k.bytes += int64(n)
}

// rate gives bytes a second, 0 if it is not known.
func (k *wire) rate() (r float64) {
	for _, v := range k.rates {
		r = max(r, v)
	}
	return r
}

// roundTrip gives the time to an answer, 0 if it is not known.
func (k *wire) roundTrip() time.Duration {
	if k.trip == 0 || k.last > 0 && k.last < k.trip {
		return k.last
	}
	return k.trip
}

// full is how many bytes on the wire fill the link: what it brings in a round trip.
func (k *wire) full() int64 {
	return min(max(int64(k.rate()*k.roundTrip().Seconds()), leastFull), mostWindow)
}

// window is up to how many bytes on the wire another request may begin. It is more
// than fills the link, or that it is faster than it was would never show.
func (k *wire) window() int64 { return min(max(2*k.full(), leastWindow), mostWindow) }

// portion is what a tenth of a second brings.
func (k *wire) portion() int64 {
	return min(max(int64(k.rate()/10), leastPortion), mostPortion)
}
