// A weight's histogram as a small SVG.
const Histogram = (() => {
  const WIDTH = 300;
  const HEIGHT = 74;
  const FOOT = 14;

  const draw = (stats) => {
    const [low, high] = stats.range;
    const svg = d3.create("svg").attr("class", "histogram").attr("viewBox", `0 0 ${WIDTH} ${HEIGHT}`).attr("role", "img");
    svg.attr("preserveAspectRatio", "none").attr("aria-label", `Histogram from ${Format.real(low)} to ${Format.real(high)}`);
    const most = Math.max(...stats.counts, 1);
    const x = d3.scaleLinear([0, stats.counts.length], [0, WIDTH]);
    const y = d3.scaleLinear([0, most], [0, HEIGHT - FOOT - 2]);
    const step = (high - low) / stats.counts.length;
    const bars = svg.selectAll("rect").data(stats.counts).join("rect");
    bars.attr("x", (_, i) => x(i) + 0.5).attr("width", Math.max(x(1) - 1, 1));
    bars.attr("y", (count) => HEIGHT - FOOT - height(count, y)).attr("height", (count) => height(count, y));
    bars.append("title").text((count, i) => `${Format.real(low + i * step)} to ${Format.real(low + (i + 1) * step)}: ${Format.count(count)}`);
    svg.append("line").attr("x1", 0).attr("x2", WIDTH).attr("y1", HEIGHT - FOOT).attr("y2", HEIGHT - FOOT);
    if (low < 0 && high > 0) {
      const zero = (-low / (high - low)) * WIDTH;
      svg.append("line").attr("x1", zero).attr("x2", zero).attr("y1", 0).attr("y2", HEIGHT - FOOT);
      if (zero > 70 && zero < WIDTH - 70) text(svg, zero, "middle", "0");
    }
    text(svg, 0, "start", Format.real(low));
    text(svg, WIDTH, "end", Format.real(high));
    return svg.node();
  };

  // What is there but rare stays visible.
  const height = (count, y) => (count ? Math.max(y(count), 1) : 0);

  const text = (svg, x, anchor, words) =>
    svg.append("text").attr("x", x).attr("y", HEIGHT - 3).attr("text-anchor", anchor).text(words);

  return { draw };
})();
