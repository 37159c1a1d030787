// Numbers for people.
const Format = (() => {
  const scaled = (value, base, units) => {
    let step = 0;
    while (Math.abs(value) >= base && step < units.length - 1) {
      value /= base;
      step += 1;
    }
    const digits = step === 0 ? String(Math.round(value)) : value >= 99.95 ? value.toFixed(0) : Number(value.toPrecision(3));
    return units[step] ? `${digits} ${units[step]}` : String(digits);
  };

  return {
    // 3540000 -> "3.54 M"
    short: (value) => scaled(value, 1000, ["", "k", "M", "G", "T", "P"]),
    // 2048 -> "2 KiB"
    bytes: (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]),
    // 1234567 -> "1,234,567"
    count: (value) => Math.round(value).toLocaleString("en-US"),
    percent: (share) => (share >= 0.0995 ? `${Math.round(share * 100)} %` : share > 0 ? `${(share * 100).toPrecision(2)} %` : "0 %"),
    // Any number with a few digits; null stands for one beyond the range of floats.
    real: (value) => (value === null ? "out of range" : Number(value.toPrecision(5)).toString()),
    // "before -> after" as a relative change
    change: (before, after) => (before ? `${after >= before ? "+" : "−"}${Format.percent(Math.abs(after / before - 1))}` : ""),
  };
})();
