package main

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// chart is a plot of horizontal bars: groups from above to below, in each a bar a
// series.
type chart struct {
	file, title, note, axis string
	log                     bool
	base                    float64 // where bars begin; 0 of a logarithmic axis is below the least
	groups                  []group
	series                  []string // in the order of the legend
	marks                   []string
}

type group struct {
	label string
	bars  []bar
	marks []mark
}

type bar struct {
	series           string
	value, low, high float64
	target           float64 // 0 for none
}

// mark is a line through a group.
type mark struct {
	name string
	at   float64
}

// group gives the group of a label, a new one if there is none.
func (c *chart) group(label string) *group {
	i := slices.IndexFunc(c.groups, func(g group) bool { return g.label == label })
	if i < 0 {
		i = len(c.groups)
		c.groups = append(c.groups, group{label: label})
	}
	return &c.groups[i]
}

func (c *chart) add(label, series string, values []float64, bound bool) {
	g, names := c.group(label), &c.series
	if bound {
		names = &c.marks
		g.marks = append(g.marks, mark{series, median(values)})
	} else {
		g.bars = append(g.bars, bar{series: series, value: median(values), low: lowest(values), high: highest(values)})
	}
	if !slices.Contains(*names, series) {
		*names = append(*names, series)
	}
}

func (c *chart) has(label, series string) bool {
	return slices.ContainsFunc(c.group(label).bars, func(b bar) bool { return b.series == series })
}

// target sets a mark upon a bar, if it is there.
func (c *chart) target(label, series string, at float64) {
	for i, b := range c.group(label).bars {
		if b.series == series {
			c.group(label).bars[i].target = at
		}
	}
}

// spans reports whether the greatest bar is more than so many times the least.
func (c *chart) spans(times float64) bool {
	least, most := c.extent()
	return least > 0 && most > times*least
}

// extent is the least and the greatest that is drawn, other than 0.
func (c *chart) extent() (least, most float64) {
	least = math.Inf(1)
	take := func(x float64) {
		if x > 0 {
			least, most = min(least, x), max(most, x)
		}
	}
	for _, g := range c.groups {
		for _, b := range g.bars {
			take(b.low)
			take(b.high)
			take(b.target)
		}
		for _, m := range g.marks {
			take(m.at)
		}
	}
	if most == 0 {
		return 0, 1
	}
	return least, most
}

// Sizes in pixels.
const (
	svgWidth   = 880
	svgLeft    = 190 // where the axis begins
	svgRight   = 80  // what the last bar leaves for its number
	svgBar     = 13
	svgPitch   = 16 // from bar to bar
	svgGap     = 14 // between groups
	svgLetter  = 6.4
	svgLegends = 18 // a line of the legend
)

// svgStyle has the colours: those of a reader who asks for dark ones too. The
// first four are of ours, the others of everybody else; both sets are told apart
// by those who see no red or green, and by their order.
const svgStyle = `
text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}text.title{font-size:15px;font-weight:600}text.dim,text.num{font-size:11px}
.range{opacity:.7}.mark,.target{stroke-width:2}.mark{stroke-dasharray:4 3}
.page{fill:#fff}text{fill:#1c1f24}.dim{fill:#5c6470}.grid{stroke:#d9dde3}.base{stroke:#5c6470}.range,.mark,.target{stroke:#1c1f24}.a0{fill:#1f5fbf}.a1{fill:#0b8f7e}.a2{fill:#4f9be8}.a3{fill:#57c3b0}.r0{fill:#8a8f98}.r1{fill:#d9822b}.r2{fill:#b0487a}.r3{fill:#8c6d1f}.r4{fill:#c9a23a}.r5{fill:#5b4b8a}
@media (prefers-color-scheme:dark){.page{fill:#15181d}text{fill:#e8eaee}.dim{fill:#a3abb6}.grid{stroke:#333a44}.base{stroke:#a3abb6}.range,.mark,.target{stroke:#e8eaee}.a0{fill:#5b9cf5}.a1{fill:#2bb8a3}.a2{fill:#a5cdfb}.a3{fill:#96e0d2}.r0{fill:#9aa0aa}.r1{fill:#f0a050}.r2{fill:#e07fae}.r3{fill:#c7a24a}.r4{fill:#ecd07a}.r5{fill:#a596d8}}
`

// order puts ours before the others, the same way in all groups.
func (c *chart) order() {
	rank := func(s string) int {
		if strings.HasPrefix(s, "varve") {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(c.series, func(a, b string) int { return rank(a) - rank(b) })
	for _, g := range c.groups {
		slices.SortStableFunc(g.bars, func(a, b bar) int { return slices.Index(c.series, a.series) - slices.Index(c.series, b.series) })
	}
}

// colours are classes by series: the same system has the same colour wherever it
// is among the same others.
func (c *chart) colours() map[string]string {
	out, ours, others := map[string]string{}, 0, 0
	for _, s := range c.series {
		if strings.HasPrefix(s, "varve") {
			out[s] = fmt.Sprintf("a%d", ours%4)
			ours++
		} else {
			out[s] = fmt.Sprintf("r%d", others%6)
			others++
		}
	}
	return out
}

// svg draws the chart. The same chart gives the same bytes.
func (c *chart) svg() []byte {
	c.order()
	s := newScale(c)
	colours := c.colours()
	var body bytes.Buffer
	y := 30.0
	text(&body, 16, y, "title", "start", c.title)
	y += 17
	text(&body, 16, y, "dim", "start", c.note)
	y = c.legend(&body, y+svgLegends, colours) + 10
	top := y
	var bars bytes.Buffer
	for _, g := range c.groups {
		from := y
		text(&bars, svgLeft-10, from+float64(len(g.bars)*svgPitch)/2+2, "", "end", g.label)
		for _, b := range g.bars {
			s.bar(&bars, y, b, colours[b.series])
			y += svgPitch
		}
		for _, m := range g.marks {
			x := s.x(m.at)
			fmt.Fprintf(&bars, "<line class=\"mark\" x1=%q y1=%q x2=%q y2=%q/>\n", px(x), px(from-4), px(x), px(y+1))
		}
		y += svgGap
	}
	for _, t := range s.ticks {
		x := s.x(t)
		fmt.Fprintf(&body, "<line class=\"grid\" x1=%q y1=%q x2=%q y2=%q/>\n", px(x), px(top-6), px(x), px(y))
		text(&body, x, y+15, "dim", "middle", strconv.FormatFloat(t, 'f', -1, 64))
	}
	body.Write(bars.Bytes())
	x := s.x(s.base)
	fmt.Fprintf(&body, "<line class=\"base\" x1=%q y1=%q x2=%q y2=%q/>\n", px(x), px(top-6), px(x), px(y))
	text(&body, svgLeft, y+33, "dim", "start", c.axis)
	height := px(y + 46)
	var out bytes.Buffer
	fmt.Fprintf(&out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=%q viewBox=\"0 0 %d %s\" role=\"img\">\n<title>", svgWidth, height, svgWidth, height)
	xml.EscapeText(&out, []byte(c.title)) // never fails on a buffer
	fmt.Fprintf(&out, "</title>\n<style>%s</style>\n<rect class=\"page\" width=\"%d\" height=%q/>\n", svgStyle, svgWidth, height)
	out.Write(body.Bytes())
	out.WriteString("</svg>\n")
	return out.Bytes()
}

// legend writes the names of series and marks in lines, and gives where it ends.
func (c *chart) legend(w *bytes.Buffer, y float64, colours map[string]string) float64 {
	x := 16.0
	next := func(name string, sign func(x float64)) {
		width := 28 + svgLetter*float64(len([]rune(name)))
		if x > 16 && x+width > svgWidth-16 {
			x, y = 16, y+svgLegends
		}
		sign(x)
		text(w, x+17, y+4, "", "start", name)
		x += width
	}
	for _, name := range c.series {
		next(name, func(x float64) {
			fmt.Fprintf(w, "<rect x=%q y=%q width=\"12\" height=\"12\" rx=\"2\" class=%q/>\n", px(x), px(y-6), colours[name])
		})
	}
	for _, name := range c.marks {
		next(name, func(x float64) {
			fmt.Fprintf(w, "<line class=\"mark\" x1=%q y1=%q x2=%q y2=%q/>\n", px(x+6), px(y-8), px(x+6), px(y+8))
		})
	}
	return y + svgLegends
}

// scale is an axis.
type scale struct {
	log        bool
	base       float64
	start, end float64
	ticks      []float64
}

func newScale(c *chart) scale {
	least, most := c.extent()
	if !c.log {
		step := niceStep(most / 6)
		s := scale{end: step * math.Ceil(most/step)}
		for i := 0.0; i*step <= s.end*1.0001; i++ {
			s.ticks = append(s.ticks, round(i*step))
		}
		return s
	}
	s := scale{log: true, base: c.base}
	for e := int(math.Floor(math.Log10(least))) - 1; len(s.ticks) == 0 || s.ticks[len(s.ticks)-1] < most; e++ {
		for _, m := range []float64{1, 2, 5} {
			t := round(m * math.Pow10(e))
			if last := len(s.ticks) - 1; last >= 0 && s.ticks[last] >= most {
				break
			}
			// The greatest tick that is not above the least value comes first.
			if t <= least {
				s.ticks = s.ticks[:0]
			}
			s.ticks = append(s.ticks, t)
		}
	}
	if c.base > 0 && c.base < s.ticks[0] {
		s.ticks = slices.Insert(s.ticks, 0, c.base)
	}
	if c.base > s.ticks[len(s.ticks)-1] {
		s.ticks = append(s.ticks, c.base)
	}
	s.start, s.end = s.ticks[0], s.ticks[len(s.ticks)-1]
	s.base = cmp.Or(c.base, s.start)
	return s
}

// round takes what binary fractions add.
func round(x float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(x, 'g', 6, 64), 64)
	if err != nil {
		return x
	}
	return r
}

// niceStep is the least of 1, 2 and 5 times a power of ten that is not below x.
func niceStep(x float64) float64 {
	p := math.Pow10(int(math.Floor(math.Log10(x))))
	for _, m := range []float64{1, 2, 5} {
		if m*p >= x*0.9999 {
			return m * p
		}
	}
	return 10 * p
}

func (s scale) x(v float64) float64 {
	const room = svgWidth - svgLeft - svgRight
	if !s.log {
		return svgLeft + room*v/s.end
	}
	if v <= 0 {
		return svgLeft
	}
	return svgLeft + room*(math.Log(v)-math.Log(s.start))/(math.Log(s.end)-math.Log(s.start))
}

func (s scale) bar(w *bytes.Buffer, y float64, b bar, colour string) {
	from, to := s.x(s.base), s.x(b.value)
	left, width := min(from, to), max(math.Abs(to-from), 1)
	fmt.Fprintf(w, "<rect x=%q y=%q width=%q height=\"%d\" rx=\"1\" class=%q/>\n", px(left), px(y), px(width), svgBar, colour)
	middle, end := y+svgBar/2.0, max(from, to)
	if b.high > b.low {
		fmt.Fprintf(w, "<line class=\"range\" x1=%q y1=%q x2=%q y2=%q/>\n", px(s.x(b.low)), px(middle), px(s.x(b.high)), px(middle))
		end = max(end, s.x(b.high))
	}
	if b.target > 0 {
		x := s.x(b.target)
		fmt.Fprintf(w, "<line class=\"target\" x1=%q y1=%q x2=%q y2=%q/>\n", px(x), px(y-1.5), px(x), px(y+svgBar+1.5))
		if x > end-2 && x < end+40 {
			end = x
		}
	}
	text(w, end+5, y+10.5, "num", "start", short(b.value))
}

func text(w *bytes.Buffer, x, y float64, class, anchor, s string) {
	fmt.Fprintf(w, "<text x=%q y=%q", px(x), px(y))
	if class != "" {
		fmt.Fprintf(w, " class=%q", class)
	}
	fmt.Fprintf(w, " text-anchor=%q>", anchor)
	xml.EscapeText(w, []byte(s)) // never fails on a buffer
	w.WriteString("</text>\n")
}

// px is a length with a tenth of a pixel.
func px(x float64) string { return strconv.FormatFloat(x, 'f', 1, 64) }
